"""The project's metrics, one `evaluate.Metric` a module.

Each returns `{"value", "ci95": [low, high], "n", "values"}`: the estimate, its 95% interval, the number of
independent examples, and the value of each. Import the class, or `evaluate.load` the module's file: neither
needs the network, which `evaluate.load("accuracy")` does.
"""
