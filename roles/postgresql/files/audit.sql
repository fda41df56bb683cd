-- Gives the audit log a keeper: a role that owns it and that nobody is a member of. Run by a superuser in the database of
-- Atlas, before its first migration; running it again changes nothing.
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'atlas_audit') THEN
        CREATE ROLE atlas_audit NOLOGIN;
    END IF;
END $$;

-- The owner of a schema may drop what is in it, whoever owns that. The owner of the database owns "public" otherwise.
ALTER SCHEMA public OWNER TO CURRENT_USER;
GRANT USAGE, CREATE ON SCHEMA public TO pg_database_owner, atlas_audit;

-- A migration hands in the statements that make the log. They run as the keeper, and only as long as there is no log.
CREATE OR REPLACE FUNCTION public.establish_audit(statements text[]) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS
$$
DECLARE
    statement text;
BEGIN
    IF to_regclass('public.audit') IS NOT NULL THEN
        RAISE EXCEPTION 'there is an audit log already';
    END IF;
    FOREACH statement IN ARRAY statements LOOP
        EXECUTE statement;
    END LOOP;
END
$$;
ALTER FUNCTION public.establish_audit(text[]) OWNER TO atlas_audit;
REVOKE ALL ON FUNCTION public.establish_audit(text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.establish_audit(text[]) TO pg_database_owner;
