"""The gate: is this multi-view data fit to train on, and if not, what is wrong with it?"""
