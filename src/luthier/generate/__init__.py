"""Writing text with a decoder: how a token is drawn (sampling), how one follows the other for several texts at once
(steps, engine), and whole answers (generate)."""
