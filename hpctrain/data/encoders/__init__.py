"""Text to tokens: SentencePiece is the reference, the others must agree with it."""
