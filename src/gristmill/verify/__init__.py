"""Programs that check an answer: numbers, mathematics, formats, instructions, JSON schemas."""
