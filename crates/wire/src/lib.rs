//! What two processes must agree on: OpenAI types, error envelope, state snapshot.
