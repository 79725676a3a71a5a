"""The runtime knows tokens: it schedules sequences over an executor, samples, stops, and detokenizes."""
