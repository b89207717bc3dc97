"""The Gradio page: forms, a job queue, a model cache, uploads and limits."""
