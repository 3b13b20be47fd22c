"""Do poses and pictures belong together, and which single mistake explains it if they don't?"""
