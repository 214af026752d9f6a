"""What a step costs: the server beside a bare gRPC echo of the same bytes, taking turns in one run."""
