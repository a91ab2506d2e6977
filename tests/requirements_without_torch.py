"""Print what setup.cfg requires, tests included, but for torch and what brings torch along: `make test-light`."""

import sys
from configparser import ConfigParser

BRING_TORCH = ("torch", "transformer-lens", "accelerate", "peft")

config = ConfigParser()
config.read("setup.cfg")
lines = config["options"]["install_requires"] + config["options.extras_require"]["test"]
requirements = [line for line in lines.split() if line and not line.startswith(BRING_TORCH)]
sys.stdout.write("\n".join(requirements) + "\n")
