{{- define "dspark.hpa" -}}
{{- $scaling := (index .root.Values .component).autoscaling -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) }}
{{- fail (printf "%s.autoscaling.minReplicas %v is above maxReplicas %v" .component $scaling.minReplicas $scaling.maxReplicas) }}
{{- end -}}
{{- if not (or $scaling.metrics $scaling.targetCPUUtilizationPercentage) }}
{{- fail (printf "%s.autoscaling.enabled is true: set %s.autoscaling.metrics or targetCPUUtilizationPercentage" .component .component) }}
{{- end -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "dspark.componentName" . }}
  labels:
    {{- include "dspark.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "dspark.componentName" . }}
  minReplicas: {{ $scaling.minReplicas }}
  maxReplicas: {{ $scaling.maxReplicas }}
  metrics:
    {{- if $scaling.metrics }}
    {{- toYaml $scaling.metrics | nindent 4 }}
    {{- else }}
    - type: Resource
      resource:
        name: cpu
        target:
          type: Utilization
          averageUtilization: {{ $scaling.targetCPUUtilizationPercentage }}
    {{- end }}
  {{- with $scaling.behavior }}
  behavior:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
