"""What finished runs say: a table of them, statistics over seeds and objects, attribution, claims.

Numbers, tables and rules; sentences about results stand in notebook 04 and are made from these.
"""
