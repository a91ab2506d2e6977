"""The tools of this package, a function each; `definitions.json` describes them to models and to the registry."""
