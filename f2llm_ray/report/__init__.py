"""What a person reads of a run: report, cards, plots, tables."""
