"""TRL's trainers under a policy: what `PolicyMixin` does beside one of them. Imports TRL only when one is used."""
