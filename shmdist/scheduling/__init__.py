"""Work spread over workers: the engine of maps, batches and their sizes, retries, pools."""
