"""The edge tunnel's connector: what dials out to an edge and serves what comes back."""
