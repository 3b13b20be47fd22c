"""What the runs of a study say: tables, statistics, attribution, claims, costs."""
