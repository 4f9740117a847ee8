"""Decide what may be concluded: protocols, statistics, and the experiments that claims and comparisons rest on."""
