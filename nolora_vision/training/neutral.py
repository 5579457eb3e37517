"""Fields of RunConfig that change no number of a result: they may differ between runs that are compared, or go on."""

NEUTRAL = (
    *("output", "experiment", "report_to", "workers", "cache_images", "traceback", "resume", "resume_changed"),
    *("checkpoint_minutes", "checkpoint_steps", "keep_checkpoints"),
)
