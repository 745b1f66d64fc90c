"""Classes of exams by a fine-tuned model."""
