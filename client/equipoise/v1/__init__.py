"""The contract's generated stubs; see proto/equipoise/v1/policy.proto."""
