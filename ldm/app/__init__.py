"""The browser app: forms, a queue of one running job, model cache, uploads and limits."""
