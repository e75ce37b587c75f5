"""What a user reads, copies and edits: one thin module for each stage, and a folder of YAML files for each scale."""
