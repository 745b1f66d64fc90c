"""The contract between ingest and training: codec, records, shards. All that training imports of this package."""
