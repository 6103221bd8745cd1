"""Writing text with a decoder: how a token is drawn (sampling) and how one follows the other (generate)."""
