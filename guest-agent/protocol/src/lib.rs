//! Exactly what crosses the vsock between host and agent.
