"""Steps that change documents."""
