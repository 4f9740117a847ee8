"""Self-contained HTML pages: a run, a claim, detections, the demo. Importing this package draws nothing."""
