"""The population: its layout, one member's parameters, the evaluation of all members, their fitness."""
