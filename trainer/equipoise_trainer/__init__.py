"""The reference trainer of Equipoise."""
