"""How long a client in a test waits for a server that lives: a busy machine may take its time to answer."""

from equipoise import Timeout

PATIENT = Timeout(step=60.0, connect=60.0, call=60.0)
