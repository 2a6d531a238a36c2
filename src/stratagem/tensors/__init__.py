"""Operations on tensors that may be sharded across ranks."""
