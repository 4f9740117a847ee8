"""Run and judge experiments for claims and comparisons, by protocols and statistics."""
