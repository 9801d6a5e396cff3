"""What data/clean.py does to a text: rules, their words, faults, near-duplicates, the report."""
