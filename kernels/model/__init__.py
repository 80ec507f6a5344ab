"""The model graphs, written against the op table: config, weights, trunk, MTP head, memory, token choice."""
