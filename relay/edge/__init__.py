"""The tunnel's edge: connectors in, visitors' traffic out to them (edge tunnel specification)."""
