"""The audit report: one HTML page, and the same facts as JSON."""
