"""Rule-based verifiers of answers: numbers, mathematics, formats, instructions, JSON schemas."""
