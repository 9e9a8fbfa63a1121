"""CHASM."""
