"""Steps that drop documents."""
