"""Operations that the release has in Triton."""
