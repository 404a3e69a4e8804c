"""The corridor that one image walks through: pixels -> image tokens -> visual tokens -> words."""
