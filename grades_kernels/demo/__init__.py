"""The demo: a small transformer is fine-tuned with AdamW and with GradESAdamW."""
