"""Quality as evidence: that speculation changes no token, what a text costs a model, how far a quantised file is from its parent,
and how many tasks are solved."""
