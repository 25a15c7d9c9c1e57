"""Load test of a running gateway: streams chats, measures what users see and judges a speed promise."""
