"""From an open model to text: loader, session, sampler, generation."""
