"""Problems of reasoning-gym as a data set, and how small models can work some of them out."""
