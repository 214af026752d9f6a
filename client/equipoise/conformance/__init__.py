"""The conformance kit: whether a server keeps the contract, by golden vectors and by checks; see `proto/docs`."""
