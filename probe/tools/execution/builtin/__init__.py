"""The tools of this package, a function each; `definitions.json` tells models and the registry of them."""
