"""The language model of `equipoise train lm`: data, model, methods, experiment."""
