"""Write self-contained HTML pages: a run, a claim, detections, the demo. The import of this package draws nothing."""
