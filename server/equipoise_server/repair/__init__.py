"""What is done when state is damaged: find out what can be saved, say what is lost, and change it when told to."""

from equipoise_server.repair.diagnosis import Diagnosis, LogFacts, diagnose, judge
from equipoise_server.repair.directory import DirectoryRepair, FileDamage, NotRepairable, repaired
from equipoise_server.repair.policies import Examined, PolicyRepair, examine_all

__all__ = [
    "Diagnosis",
    "DirectoryRepair",
    "Examined",
    "FileDamage",
    "LogFacts",
    "NotRepairable",
    "PolicyRepair",
    "diagnose",
    "examine_all",
    "judge",
    "repaired",
]
