"""The edge tunnel's wire formats (edge tunnel specification): Cap'n Proto messages, RPC subset,
stream and datagram headers, credentials and configuration documents. Pure."""
